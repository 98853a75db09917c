"""Images: files, sizes and colour."""
