"""Files and what is in them: reading, recognising, converting."""
