"""`lmc store`: what a folder of the disk tier holds, whether it is sound, and chunks out and in."""
