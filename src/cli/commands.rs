//! (to be written)
use super::args::{FrontendArgs, PauseArgs, Target};

pub fn pause(_args: &PauseArgs) -> u8 {
    1
}
pub fn resume(_target: &Target) -> u8 {
    1
}
pub fn version(_target: &Target) -> u8 {
    1
}
pub fn frontend(_args: &FrontendArgs) -> u8 {
    1
}
pub fn stop(_target: &Target) -> u8 {
    1
}
