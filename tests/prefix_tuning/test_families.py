"""Every family and every capability against a reference, and the table of what works (README), which is made from these tests.

    pytest tests/prefix_tuning/test_families.py --update-support       writes family_support.json; then benchmarks/report.py
"""

import json
from pathlib import Path

import pytest
import transformers

from support.capabilities import CAPABILITIES, Case, NotPossible
from support.models import MODELS

SUPPORT = Path(__file__).with_name("family_support.json")


def outcome(name: str, capability: str) -> str:
    """"yes", or why not: refused by us, or beyond the plain model. Anything that is wrong raises."""
    try:
        CAPABILITIES[capability](Case(name))
    except NotImplementedError as refusal:
        return f"refused: {refusal}"
    except NotPossible as reason:
        return f"not possible: {reason}"
    return "yes"


@pytest.fixture(scope="module")
def support(request):
    """The committed outcomes; with --update-support, the new ones, written when all are there."""
    recorded = json.loads(SUPPORT.read_text()) if SUPPORT.exists() else {}
    if not request.config.getoption("--update-support"):
        yield recorded
        return
    found = {"transformers": transformers.__version__, "families": {name: {} for name in MODELS}}
    yield found
    missing = [name for name, outcomes in found["families"].items() if len(outcomes) != len(CAPABILITIES)]
    assert not missing, f"not written, without outcomes of {missing}"
    temporary = SUPPORT.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=2) + "\n")
    temporary.replace(SUPPORT)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", MODELS)
def test_capability(name, capability, support, request):
    found = outcome(name, capability)
    if request.config.getoption("--update-support"):
        support["families"][name][capability] = found
    elif support["transformers"] == transformers.__version__:
        assert found == support["families"][name][capability]
    else:  # what the plain model cannot do may differ from version to version
        assert found == "yes" or found.startswith("not possible") or support["families"][name][capability] != "yes"
