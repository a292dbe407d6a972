"""Floor 3: one file a job, a straight line of calls that reads like the paragraph that describes it."""
