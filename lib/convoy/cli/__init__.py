"""`convoy`: the door for people. stdout is the result, stderr is progress."""
