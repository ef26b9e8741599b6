"""A forward of a backbone is known to the thread that it runs in, while it runs."""

from threading import Thread

import pytest

from hf_sparse.core.backbone_call import backbone_call, current_call


def test_it_is_there_within_the_block_alone():
    assert current_call() is None
    with backbone_call():
        outer = current_call()
        with pytest.raises(ZeroDivisionError), backbone_call():
            assert current_call() is not outer
            raise ZeroDivisionError
        assert current_call() is outer is not None
    assert current_call() is None


def test_threads_have_calls_of_their_own():
    found = []
    with backbone_call():
        thread = Thread(target=lambda: found.append(current_call()))
        thread.start()
        thread.join()
    assert found == [None]
