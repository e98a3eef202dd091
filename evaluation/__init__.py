"""What a model costs and what it still knows (``evaluate.py``), and the report of a run (``evaluation.report``)."""
