"""What binds the library to DVC: parameters and their checks, runtime knobs, the frame of a stage, choices, sweeps, the gate.

The only room that reads YAML, argv or the working directory. It may import every room but `cli`, and stages import it.
"""
