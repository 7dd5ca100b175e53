"""Where is this run going? Curve laws, and the projection of one trial's final BPB."""
