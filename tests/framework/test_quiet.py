from transformers.utils import logging

from framework.quiet import quiet_bars


def test_bars_are_off_inside_and_as_before_afterwards():
    before = logging.is_progress_bar_enabled()
    with quiet_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() == before


def test_bars_that_were_off_stay_off():
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_bars():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        if was_enabled:
            logging.enable_progress_bar()
