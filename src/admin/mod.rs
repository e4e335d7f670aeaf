//! The admin socket `admin.sock` in the state directory: the server inside the running sidecar, and
//! the client behind the subcommands.

pub mod client;
mod server;

pub use server::AdminServer;
