//! Client side of the admin socket.
