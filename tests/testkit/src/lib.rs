//! Fake engines and fake frontends over libzmq.
