"""Reading prepared sets: shards, the order of training, decoding, augmentation and the loader."""

import os

# Importing Albumentations would otherwise ask the network for a newer version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
