"""The HDR effect against OpenCV's exposures and fusion."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from skimage import data

from faithdiff_core.errors import SettingsError
from faithdiff_core.images.hdr import hdr_effect

EXPOSURES = (-0.9, -0.7, -0.45, -0.25, 0.0, 0.2, 0.4, 0.6, 0.8)


@pytest.mark.parametrize("size", [(96, 136), (75, 61), (9, 20), (1, 5)])
@pytest.mark.parametrize("amount", [0.3, 1.0, 2.0])
def test_it_is_the_published_one(size: tuple[int, int], amount: float) -> None:
    rgb = data.astronaut()[: size[0], 150 : 150 + size[1]].copy()
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    exposed = [cv2.convertScaleAbs(bgr, alpha=1 + amount * exposure) for exposure in EXPOSURES]
    fused = np.clip(cv2.createMergeMertens().process(exposed), 0, 1)[..., ::-1]
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    got = hdr_effect(tensor, amount)[0].permute(1, 2, 0).numpy()
    assert np.abs(got - fused).max() < 1e-3
    assert np.abs(got - rgb / 255).mean() > 0.005


def test_off_and_out_of_range() -> None:
    image = torch.rand(2, 3, 8, 8)
    assert hdr_effect(image, 0.0) is image
    assert torch.allclose(hdr_effect(image, 1.0)[1:], hdr_effect(image[1:], 1.0), atol=1e-6)
    with pytest.raises(SettingsError, match="hdr must lie between 0 and 2, got 3"):
        hdr_effect(image, 3.0)
