//! Sockets with the options vLLM gives them (`utils/network_utils.py`, `make_zmq_socket`).

use zmq::{Context, Socket, SocketType};

/// A socket as vLLM makes it: no high water mark, no linger unless given.
pub fn open(context: &Context, kind: SocketType) -> Result<Socket, zmq::Error> {
    let socket = context.socket(kind)?;
    match kind {
        SocketType::XPUB | SocketType::XSUB => {}
        _ => {
            socket.set_sndhwm(0)?;
            socket.set_rcvhwm(0)?;
        }
    }
    if kind == SocketType::XPUB {
        socket.set_xpub_verbose(true)?;
    }
    // vLLM leaves libzmq's endless linger on most sockets; a test must be able to end.
    socket.set_linger(0)?;
    Ok(socket)
}

/// Opens and binds; the second value is the address that was really bound.
pub fn bind(context: &Context, kind: SocketType, address: &str) -> Result<(Socket, String), zmq::Error> {
    let socket = open(context, kind)?;
    socket.bind(address)?;
    let bound = socket.get_last_endpoint()?.map_err(|_| zmq::Error::EINVAL)?;
    Ok((socket, bound))
}

/// Opens and connects, with a routing id if one is given.
pub fn connect(
    context: &Context,
    kind: SocketType,
    address: &str,
    identity: Option<&[u8]>,
) -> Result<Socket, zmq::Error> {
    let socket = open(context, kind)?;
    if let Some(identity) = identity {
        socket.set_identity(identity)?;
    }
    socket.connect(address)?;
    Ok(socket)
}

/// The next multipart message, if one is there.
pub fn take(socket: &Socket) -> Result<Option<Vec<Vec<u8>>>, zmq::Error> {
    match socket.recv_multipart(zmq::DONTWAIT) {
        Ok(frames) => Ok(Some(frames)),
        Err(zmq::Error::EAGAIN | zmq::Error::EINTR) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `(rank).to_bytes(2, "little")`.
pub fn identity(rank: u16) -> [u8; 2] {
    rank.to_le_bytes()
}
