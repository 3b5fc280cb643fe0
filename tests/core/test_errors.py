"Errors beyond nbs/core/05_errors.ipynb: subclasses, copies, and the way through worker processes."

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from refusals import refused

from ct_nb.core.errors import LONGEST_SENTENCE, FileError, InputError, reading, warn


class GridError(FileError):
    "A subclass of a subclass."


@pytest.mark.parametrize("kind, field", [(InputError, "argument"), (FileError, "file")])
def test_fields_text_and_details(kind, field):
    error = kind("x", "is wrong", count=3)
    other = {"argument": "file", "file": "argument"}[field]
    assert getattr(error, field) == "x" and getattr(error, other) is None
    assert (error.reason, error.count, error.details) == ("is wrong", 3, {"count": 3})
    assert str(error) == "x: is wrong" and isinstance(error, ValueError)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_copies_keep_class_and_fields(copied):
    error = copied(GridError("a.json", "is empty", size=0))
    assert type(error) is GridError and str(error) == "a.json: is empty"
    assert (error.file, error.reason, error.size) == ("a.json", "is empty", 0)


def test_one_string_is_a_sentence():
    error = InputError("something is wrong")
    assert (str(error), error.reason) == ("something is wrong", "something is wrong")
    assert error.argument is None and error.file is None


def _refuse():
    raise FileError("scan.nii", "is empty", size=0)


def test_from_a_worker_process():
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        future = pool.submit(_refuse)
    with refused(file="scan.nii", kind=FileError) as caught:
        future.result()
    assert caught.value.size == 0


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        _refuse()


def test_from_a_worker_of_a_data_loader():
    "torch makes the error anew from a text with the traceback; its class must be the same."
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(FileError, match="scan.nii: is empty"):
        next(iter(loader))


@pytest.mark.parametrize(
    "error", [KeyError("a"), MemoryError(), OSError("odd bytes"), OSError(5, "Input/output error")]
)
def test_what_escapes_a_reader_gets_its_file(error):
    with pytest.raises(FileError) as caught, reading("scan.nrrd", what="a NRRD file"):
        raise error
    assert caught.value.file == "scan.nrrd" and str(caught.value).count("\n") == 0


def test_what_a_reader_says_itself_is_kept():
    with pytest.raises(InputError) as caught, reading("scan.nrrd"):
        raise InputError("series", "is not in it")
    assert caught.value.argument == "series" and caught.value.file is None
    with pytest.raises(FileError) as caught, reading("scan.nrrd"):
        raise InputError("has no spacing")
    assert str(caught.value) == "scan.nrrd: has no spacing"


def test_a_message_is_one_line_without_terminal_codes():
    name = "a\x1b[2J\n\u202eb.nii"
    assert str(FileError(name, "is empty")) == r"a\x1b[2J\n\u202eb.nii: is empty"
    assert FileError(name, "is empty").file == name


def _say(*sentences):
    warn(*sentences)


def test_a_warning_has_the_lines_that_it_is_given_and_the_place_of_the_caller():
    with pytest.warns(UserWarning) as caught:
        _say("2 files are left out", "a\x1b[2J\nb.nii: is empty", "c.nii: is empty")
    assert str(caught[0].message).splitlines() == [
        "2 files are left out",
        r"  a\x1b[2J\nb.nii: is empty",
        "  c.nii: is empty",
    ]
    assert caught[0].filename == __file__


def test_a_sentence_has_an_end():
    error = FileError("a" * 500 + ".nii", "x" * 10**6 + " ends so")
    assert len(str(error)) == LONGEST_SENTENCE and str(error).endswith("ends so")
    assert str(error).startswith("a" * 500) and len(error.reason) > 10**6
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_argument_made_of_the_content_is_the_files():
    for content, file in ((False, None), (True, "a.npz")):
        with pytest.raises(InputError) as caught, reading("a.npz", GridError, content=content):
            raise InputError("shape", "must be three counts")
        assert caught.value.file == file and "shape: must be three counts" in str(caught.value)
        assert isinstance(caught.value, GridError) is content
