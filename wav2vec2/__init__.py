"""HuBERT, wav2vec 2.0 and WavLM with per-layer shapes and pruning masks; importing it needs torch alone."""
