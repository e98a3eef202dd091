"""What a model costs and what it still knows: ``evaluate.py`` measures, ``evaluation/report.py`` draws."""
