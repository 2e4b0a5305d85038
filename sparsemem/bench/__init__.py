"""How time and space grow with memory size, what changed, what others take."""
