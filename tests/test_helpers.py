"""What the other tests lean on."""

import pytest
from helpers import FORMS, ranks

import peft_mora


def test_every_method_has_its_row():
    assert FORMS.keys() == peft_mora.METHODS.keys()


@pytest.mark.slow
def test_a_dead_rank_ends_its_partner_at_once_and_its_words_are_told(tmp_path):
    """The other one would wait until the end of the timeout, which has an error of its own."""
    body = """
        import os, time
        if rank == 1:
            print("its last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        time.sleep(999)
        """
    with pytest.raises(AssertionError, match="rank 1 ended with -9:\\nits last words"):
        ranks(body, tmp_path, timeout=120)
