"""From a manifest to batches of waveforms (data section of the paper), without models or flags.

    manifest = read_manifest("data/librispeech/train960.tsv")  # manifest.py
    check_files(manifest)  # speech.py
    batches = make_batches(manifest.lengths, max_tokens=87.5 * SAMPLE_RATE, min_len=32_000, max_len=250_000)
    sampler = BatchSampler(manifest.lengths, batches, num_replicas=4, rank=0, shuffle=True, seed=0)  # batches.py
    loader = DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None, num_workers=4)

The sampler yields whole batches, hence ``batch_size=None``. It also chooses the crops, so that the training data
depend on the seed and the epoch alone, not on the number of workers. ``corpus.py`` finds, splits and counts the files
that manifests list.
"""
