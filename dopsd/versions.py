"""Numbers that stand for code in every identity (:mod:`dopsd.identity`): a result of another number is made anew.

Whoever changes what code makes of the same inputs raises its number; tests/test_identity.py knows which code each one
stands for, and reminds. A change that alters no result leaves them alone.
"""

DATA_VERSION = 3
"""Of the checks of a data set."""
ENCODING_VERSION = 2
"""Of what captions and pictures are encoded into."""
METHOD_VERSION = 1
"""Of what is learnt from the same encodings: the models' answers, roll-outs, losses, optimizer."""
SCORES_VERSION = 3
"""Of what is drawn and how it is scored."""
EXPORT_VERSION = 5
"""Of the exported files, the model card and what is stored in the registry."""
