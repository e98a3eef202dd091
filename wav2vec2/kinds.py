"""Names of what a task head recognises and of a head's settings; without torch, so that flags are parsed at once."""

TEXT, CLIPS, SEGMENTS = "text", "clips", "segments"
UNITS = ("words", "characters")  # what CTC recognises of a text
LAYERS = ("last", "weighted")  # what a head reads
POOLINGS = ("mean", "attentive")  # how it joins the frames of a clip
