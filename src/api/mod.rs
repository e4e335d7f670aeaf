//! What crosses a door of the sidecar: the same types for the command line, the admin socket, HTTP and the tasks behind
//! them.

mod command;
mod sleep;
mod status;
mod update;

pub use command::*;
pub use sleep::*;
pub use status::*;
pub use update::*;
