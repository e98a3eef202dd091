"""What is below training and evaluation and knows a label: lists, batches, linear heads, scores, a task's loss."""
