"""The kernels' compiled PTX, run thread by thread on a CPU; see machine.py and __main__.py."""
