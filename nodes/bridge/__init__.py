"""What joins FaithDiff to ComfyUI: patch, sampling wrappers, models, and the types that travel in graphs."""
