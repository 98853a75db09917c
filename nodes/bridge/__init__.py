"""What joins FaithDiff to ComfyUI: the patch on the U-Net, the sampling wrappers, and the types that travel in graphs."""
