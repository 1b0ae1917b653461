"""What happens to a picture: RandAugment's N, M and p, how small a crop may be, random erasing.

N = 0 switches RandAugment off, and then M and p are not searched.
"""

from ray import tune

from ftlib.tune.spaces import When


def randaugment(values):
    return values["augment.randaugment_n"] > 0


SPACE = {
    "augment.randaugment_n": tune.randint(0, 4),
    "augment.randaugment_m": When(tune.quniform(1, 10, 0.5), given=randaugment, otherwise=0.0),
    "augment.randaugment_p": When(tune.quniform(0.1, 1, 0.1), given=randaugment),
    "augment.crop_scale[0]": tune.uniform(0.08, 0.6),
    "augment.erasing_p": tune.quniform(0, 0.5, 0.05),
}

POINTS = [
    {
        "augment.randaugment_n": 0,
        "augment.randaugment_m": 0.0,
        "augment.crop_scale[0]": 0.35,
        "augment.erasing_p": 0.0,
    },  # light
    {
        "augment.randaugment_n": 2,
        "augment.randaugment_m": 9.0,
        "augment.randaugment_p": 0.5,
        "augment.erasing_p": 0.25,
    },  # timm's usual
]
