use std::{env, io, process, thread};

fn main() {
    let mut line = String::new();
    io::stdin().read_line(&mut line).unwrap();
    let words: Vec<String> = env::args().skip(1).collect();
    let joined = thread::spawn(move || words.join(",")).join().unwrap();
    println!("hello {} {joined}", line.trim());
    eprintln!("warned");
    process::exit(3);
}
