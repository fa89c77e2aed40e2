#include <iostream>
#include <span>
#include <string>

int main(int count, char **words) {
    std::string line, joined;
    std::getline(std::cin, line);
    for (auto word : std::span(words, count).subspan(1))
        joined += (joined.empty() ? "" : ",") + std::string(word);
    std::cout << "hello " << line << " " << joined << std::endl;
    std::cerr << "warned" << std::endl;
    return 3;
}
