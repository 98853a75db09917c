"""Attribution maps: the parts of an image that cross-attention connects with a word (DAAM, Tang et al. 2022)."""
