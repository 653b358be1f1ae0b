import pytest
from support.capabilities import CAPABILITIES, Case, NotPossible
from support.models import MODELS

@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param

@pytest.mark.parametrize("capability", CAPABILITIES)
def test_cap(name, capability):
    CAPABILITIES[capability](Case(name))
