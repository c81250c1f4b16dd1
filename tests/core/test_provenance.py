"""Provenance explains results and gives nothing else away."""

import getpass
import json
import platform
from pathlib import Path

import torch

from embrm.core.provenance import provenance


def test_it_names_versions_and_no_person_host_or_path() -> None:
    found = provenance()
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    text = json.dumps(found)
    assert platform.node() not in text
    assert str(Path.cwd()) not in text
    user = getpass.getuser()
    assert user == "root" or user not in text
