"""What is refused is told by the class of the error and by its fields, not by its words."""

from contextlib import contextmanager

import pytest
from ct_nb.core.errors import InputError


@contextmanager
def refused(argument=None, *, file=None, kind=InputError):
    "The block must raise `kind` about this argument or file; gives what `pytest.raises` gives."
    with pytest.raises(kind) as caught:
        yield caught
    if argument is not None:
        assert caught.value.argument == argument, str(caught.value)
    if file is not None:
        assert str(caught.value.file).endswith(str(file)), str(caught.value)
