"""Coursework: folders of a question, a configuration, what to look for, and exercises whose answers the lab checks by running.

    course = coursework.load("memory")       # by name; or the folder that `vmlab new coursework` wrote, edited or not
    course.run()                              # its configuration, into results/
    course.answer("batch-8", 42)              # right or not, and a hint

No answer is stored: what is right is counted, priced or judged when it is asked for. The folders are ``experiments/`` of the checkout and
travel in the wheel. ``python -m vmlab.coursework`` writes their README.md and notebooks anew from ``course.yaml``.
"""

from __future__ import annotations

from vmlab.coursework.answers import Reply
from vmlab.coursework.course import Course, Exercise, load
from vmlab.coursework.folders import copy, names

__all__ = ["Course", "Exercise", "Reply", "copy", "load", "names"]
