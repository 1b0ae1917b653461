import gc

import pytest

from ftlib.gc_pause import gc_paused


def test_collection_goes_on_after_the_block_also_after_an_error():
    with gc_paused():
        assert not gc.isenabled()
        with gc_paused():
            pass
        assert not gc.isenabled(), "the outer block has not ended"
    assert gc.isenabled()
    with pytest.raises(KeyError), gc_paused():
        raise KeyError
    assert gc.isenabled()
