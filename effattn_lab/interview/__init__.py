"""Interview questions with evidence: load, check and practise them."""

from effattn_lab.interview.bank import (
    LEVELS,
    BankError,
    Evidence,
    FollowUp,
    Number,
    Question,
    load,
    select,
    topics,
)

__all__ = ["LEVELS", "BankError", "Evidence", "FollowUp", "Number", "Question", "load", "select", "topics"]
