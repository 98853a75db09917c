"""Archives: folders of any size and place, restored by several processes or machines, with a record of every image."""
