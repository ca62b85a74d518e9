"""Prompts as values: templates with a slot, words for labels, examples, calibration. No torch, no model."""

from powerhouse.prompting.calibration import CONTENT_FREE, calibrate
from powerhouse.prompting.examples import Example, choose_examples, orders_of
from powerhouse.prompting.slot import Encode, SlotRow, slot_row
from powerhouse.prompting.template import SLOT, Prompt, Template
from powerhouse.prompting.verbalizer import Verbalizer

__all__ = [
    "CONTENT_FREE",
    "SLOT",
    "Encode",
    "Example",
    "Prompt",
    "SlotRow",
    "Template",
    "Verbalizer",
    "calibrate",
    "choose_examples",
    "orders_of",
    "slot_row",
]
