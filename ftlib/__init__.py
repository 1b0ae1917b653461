"""ftlib: fine-tune image classifiers on clusters. Start with the jobs in `jobs/`, the settings in `ftlib.config`."""

import os

# Albumentations asks a package registry for its newest version when imported; that costs seconds and is nobody's business.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
