//! A run's status over HTTP: `/status.json`, and `/metrics` for Prometheus. Read-only, one short answer a connection, on one thread
//! of its own: a client that is slow or sends nonsense delays the next client by two seconds at most.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::status::Board;

/// Longest time for one client.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest request that is read.
const LONGEST: usize = 8192;

/// Answers at `address`: `HOST:PORT`, or a port of this machine alone. Gives where it listens.
///
/// # Errors
/// In words: no address, or one that is taken.
pub fn serve(address: &str, board: &Board) -> Result<SocketAddr, String> {
    let complain = |error: io::Error| format!("run.status_addr: cannot listen on {address:?}: {error}");
    let listener = match address.parse::<u16>() {
        Ok(port) => TcpListener::bind(("127.0.0.1", port)),
        Err(_) => address.to_socket_addrs().and_then(|found| TcpListener::bind(&found.collect::<Vec<_>>()[..])),
    };
    let listener = listener.map_err(complain)?;
    let local = listener.local_addr().map_err(complain)?;
    let board = board.clone();
    let thread = std::thread::Builder::new().name("http".to_owned());
    let answer = move || {
        for stream in listener.incoming() {
            match stream {
                // what goes wrong with one client is that client's matter
                Ok(stream) => drop(converse(stream, &board)),
                // no file handles left: not a reason to turn in circles
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    };
    thread.spawn(answer).map_err(complain)?;
    Ok(local)
}

fn converse(mut stream: TcpStream, board: &Board) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = read_request(&mut stream, deadline)?;
    let (status, kind, body) = respond(&request, board);
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let body = if request.starts_with(b"HEAD ") { "" } else { body.as_str() };
    stream.write_all((head + body).as_bytes())
}

/// Up to the empty line behind the head.
fn read_request(stream: &mut TcpStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > LONGEST {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => request.extend_from_slice(&piece[..n]),
        }
    }
    Ok(request)
}

fn respond(request: &[u8], board: &Board) -> (&'static str, &'static str, String) {
    let line = request.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    const TEXT: &str = "text/plain; charset=utf-8";
    if !matches!(method, "GET" | "HEAD") {
        return ("405 Method Not Allowed", TEXT, "GET /status.json or /metrics\n".to_owned());
    }
    match path.split('?').next().unwrap_or_default() {
        "/status.json" => {
            let text = serde_json::to_string_pretty(&board.get()).unwrap_or_default();
            ("200 OK", "application/json", text + "\n")
        }
        "/metrics" => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", board.get().prometheus()),
        "/" => ("200 OK", TEXT, "a run of dunlearn: /status.json, /metrics\n".to_owned()),
        _ => ("404 Not Found", TEXT, "there are /status.json and /metrics\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    #[test]
    fn status_and_metrics_are_answered() {
        let board = Board::default();
        let address = serve("0", &board).unwrap();
        assert!(address.ip().is_loopback());
        board.update(|status| status.steps = 5);
        board.step(3, 0.25, 1.0, 10);
        let answer = ask(address, "GET /status.json HTTP/1.1\r\nHost: x\r\n\r\n");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/json"), "{head}");
        assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
        let json: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!((&json["step"], &json["loss"]), (&3.into(), &0.25.into()));
        assert!(ask(address, "GET /metrics?x=1 HTTP/1.0\r\n\r\n").contains("\ndunlearn_step 3\n"));
        assert!(ask(address, "HEAD /metrics HTTP/1.0\r\n\r\n").ends_with("\r\n\r\n"));
        assert!(ask(address, "GET /etc/passwd HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /status.json HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 405"));
    }

    #[test]
    fn a_client_that_says_nothing_or_too_much_is_left() {
        let board = Board::default();
        let address = serve("127.0.0.1:0", &board).unwrap();
        let silent = TcpStream::connect(address).unwrap();
        let start = Instant::now();
        assert!(ask(address, "GET / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 200"));
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
        drop(silent);
        assert_eq!(ask(address, &"x".repeat(3 * LONGEST)), "");
        assert!(ask(address, "\0\u{1}\r\n\r\n").starts_with("HTTP/1.1 405"));
    }

    #[test]
    fn an_address_that_is_taken_is_refused_in_words() {
        let board = Board::default();
        let address = serve("0", &board).unwrap();
        let text = serve(&address.to_string(), &board).unwrap_err();
        assert!(text.starts_with("run.status_addr: cannot listen on ") && text.contains("in use"), "{text}");
        assert!(serve("nonsense", &board).is_err());
    }
}
