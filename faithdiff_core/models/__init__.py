"""FaithDiff's modules: the LQ encoder and the alignment."""
