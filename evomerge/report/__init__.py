"""Tables made from a journal."""
