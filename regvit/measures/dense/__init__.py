"""What patch tokens are good for: segmentation and depth by a linear layer, objects without one."""
