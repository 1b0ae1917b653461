import gc
import subprocess
import sys
import textwrap

import pytest

from ftlib.gc_pause import gc_paused, gc_resumed


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


def test_lasting_imports_are_left_out_once_and_what_comes_later_is_collected():
    done = in_a_process("""
        import gc, weakref
        from ftlib.gc_pause import lasting_imports

        class Cycle:
            def __init__(self):
                self.me = self

        try:
            with lasting_imports():
                raise KeyError
        except KeyError:
            assert not gc.get_freeze_count(), "what failed may be tried again"
        with lasting_imports():
            import decimal
        left_out = gc.get_freeze_count()
        assert left_out > 1000 and gc.isenabled()
        with lasting_imports():
            seen = weakref.ref(Cycle())
        assert gc.get_freeze_count() == left_out
        gc.collect()
        assert seen() is None
    """)
    assert done.returncode == 0, done.stderr


def test_collection_within_a_pause_goes_on_and_ends_with_the_block():
    with gc_paused():
        with gc_resumed():
            assert gc.isenabled()
        assert not gc.isenabled()
    with gc_resumed():
        pass
    assert gc.isenabled()


def test_pauses_of_two_threads_that_overlap_end_with_the_last():
    first, second = gc_paused(), gc_paused()
    first.__enter__()
    second.__enter__()
    with gc_resumed():
        assert gc.isenabled()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_lasting_objects_are_left_out_where_a_process_began_with_lasting_imports():
    done = in_a_process("""
        import gc
        from ftlib.gc_pause import lasting_imports, lasting_objects

        with lasting_objects():
            pass
        assert not gc.get_freeze_count(), "not a process of ftlib's own"
        with lasting_imports():
            pass
        before = gc.get_freeze_count()
        with lasting_objects():
            made = [[] for _ in range(1000)]
        assert gc.get_freeze_count() >= before + 1000 and gc.isenabled()
    """)
    assert done.returncode == 0, done.stderr


def test_a_job_ends_without_looking_through_what_it_imported():
    done = in_a_process("""
        from ftlib.cli import job

        class Module:
            def __init__(self):
                self.me = self

            def __del__(self):
                print("was looked through")

        job(lambda: print(len([Module()])), deliver_leftovers=False)
    """)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def in_a_process(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
