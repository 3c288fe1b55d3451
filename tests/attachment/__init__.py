"""Attachments from attach to detach: state, copies, orphans."""
