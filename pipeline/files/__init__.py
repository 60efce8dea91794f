"""Files of local disks as strangers may leave them: whole or not at all, regular, within bounds, plain data.

In come paths; out go bytes and values, or one line of what is wrong.
"""
