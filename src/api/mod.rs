//! What crosses a door of the sidecar: the same types for the command line, the admin socket, HTTP and the tasks behind
//! them.

mod command;
mod status;
mod update;

pub use command::*;
pub use status::*;
pub use update::*;
