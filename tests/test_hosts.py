"""The list of what is used of the hosts (tests/hosts.py) is up to date, and finds what a release takes away."""

import json
from pathlib import Path

import hosts
import peft.tuners.tuners_utils as tuners
import pytest


KEPT = json.loads((Path(__file__).parent / "hosts.json").read_text("utf-8"))


def test_the_kept_names_are_those_that_are_used_and_are_there():
    here = hosts.names_here() | hosts.attributes_here()
    assert "gone" not in here.values()
    for name in (
        "peft.tuners.tuners_utils._get_in_out_features",
        "peft.tuners.tuners_utils.BaseTuner.delete_adapter (overridden)",
        "transformers.TrainerCallback.on_step_end (overridden)",
        "._get_available_adapters (attribute)",
    ):
        assert name in here
    if KEPT["versions"] != {host: hosts.version(host) for host in hosts.HOSTS}:
        pytest.skip("other releases: make hosts WITH=... says what differs")
    assert hosts.compare(KEPT["names"], here) == []
    assert len(KEPT["names"].keys() ^ here.keys()) < 20, "python tests/hosts.py --write tests/hosts.json"


def test_what_is_gone_or_takes_other_arguments_is_named(monkeypatch):
    before = hosts.names_here()
    monkeypatch.delattr(tuners, "check_adapters_to_merge")
    monkeypatch.setattr(tuners, "_get_in_out_features", lambda module, quantized=False: None)
    changed, gone = hosts.compare(before, hosts.names_here())
    assert changed.startswith("peft.tuners.tuners_utils._get_in_out_features:\n    was (module")
    assert changed.endswith("now (module, quantized=False)")
    assert gone == "peft.tuners.tuners_utils.check_adapters_to_merge: gone"
