"""Tiny denoisers of every family."""

import pytest
from denoiser_builders import FAMILIES


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param
