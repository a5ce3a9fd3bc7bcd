"""What dense and global features are used for when nothing is trained, one file a measurement: segmentation in context
(`hummingbird`), matches between two views (`correspondence`), retrieval, objects as published, zero-shot segmentation."""
