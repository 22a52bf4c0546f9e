"""Every bad input of tests/bad_inputs.py is refused in one line, before anything is written."""

import bad_inputs
import pytest

EVERY = [
    pytest.param(call, id=f"{kind}: {description}")
    for kind, of_kind in bad_inputs.CASES.items()
    for description, call in of_kind
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", EVERY)
def test_bad_input_is_refused(call):
    with pytest.raises(bad_inputs.ERRORS) as raised:
        call()
    message = str(raised.value)
    assert message
    assert "\n" not in message
